"""The command line: one file per command, only arguments and presentation; imports stay inside the bodies."""
