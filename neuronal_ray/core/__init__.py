"""The mathematics: functions from tensors to tensors, no input or output, no device choice."""
