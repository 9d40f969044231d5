"""The command line: one file per noun. Every failure is one clear line, a hint and an exit code."""
