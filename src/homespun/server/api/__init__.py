"""What the server says over HTTP: to devices, to operators, and when something fails."""
