"""What answers for a model: the HTTP server, and the page that runs it in a browser."""
