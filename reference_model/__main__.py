"""Run the command line: `python -m reference_model`."""

from reference_model.cli import main

if __name__ == "__main__":
    main(prog_name="python -m reference_model")
