// Served unless --react is given. Empty because mini-react.js defines ReactDOM too.
