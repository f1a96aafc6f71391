"""State in Valkey or Redis; nothing else in the program imports redis."""
