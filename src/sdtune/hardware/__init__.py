"""Devices, precision, memory and processes of this machine."""
