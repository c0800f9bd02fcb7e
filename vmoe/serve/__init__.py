"""Serves a model: the HTTP server, and the page that runs the model in a browser."""
