// Updates the page's elements.

export const updateProgressBar = (progress) => (document.getElementById("progress").value = progress);

export function updateStatusMessage(message) {
  document.getElementById("message").textContent = message;
  const item = document.createElement("li");
  item.textContent = message;
  document.getElementById("log").append(item);
}
