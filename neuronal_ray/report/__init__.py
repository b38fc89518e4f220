"""Pages and tables made from the files that runs leave behind."""
