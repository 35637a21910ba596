// Served when there is no React: standin.js brings all that the page needs.
