"""Systems that are trained with the library, each in a package of its own."""
