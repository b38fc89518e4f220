"""Sources of calibration and evaluation text, as token ids."""
