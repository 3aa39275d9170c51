"""The paper's other systems, each a program of its own that uses the library gsoft by its public interface."""
