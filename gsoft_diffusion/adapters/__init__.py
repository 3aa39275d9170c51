"""Where the method and a base model meet: what is adapted, the adapter's file, several adapters on one model."""
