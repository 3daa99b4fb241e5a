"""The five methods compared: ``python -m sdtune.comparison SWEEP`` (make compare)."""
