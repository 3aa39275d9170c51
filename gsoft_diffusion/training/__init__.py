"""Training an adapter on photos."""
