"""Who may do what, and how much of it: API keys and rates.

The application asks before a body is read; nothing here knows of routes or of ASGI.
"""
