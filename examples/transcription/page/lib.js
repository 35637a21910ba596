// What the application has beside its hooks.

export const apiClient = { baseUrl: "" };

export const logger = { info: (...what) => console.info(...what), error: (...what) => console.error(...what) };
