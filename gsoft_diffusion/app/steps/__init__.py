"""The page's steps, one a file: what is on it, and which public calls its buttons make."""
