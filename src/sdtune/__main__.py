"""Entry point of ``python -m sdtune``, the same as the console script."""

from sdtune.cli.main import main

if __name__ == "__main__":
    main()
