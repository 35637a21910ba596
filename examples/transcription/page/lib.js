// The application's modules that its hooks import.

export const apiClient = { baseUrl: "" };

export const logger = { info: (...args) => console.info(...args), error: (...args) => console.error(...args) };
