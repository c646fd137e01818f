"""One tracker core and a thin backend for each framework."""
