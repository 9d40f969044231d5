"""Messages and state machines: what is said, and what may follow what. Pure; the shells do the I/O."""
