"""A page in the browser: photos, base, training, drawing, taking home. Every run is a process of its own."""
