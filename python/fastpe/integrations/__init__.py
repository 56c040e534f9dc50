"""fastpe under the names and conventions of other libraries. Nothing here is imported by `import fastpe`."""
