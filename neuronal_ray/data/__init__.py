"""Calibration and evaluation text, as token ids."""
