"""What every command shares: options, errors and exit codes, atomic files, progress, versions, memory."""
