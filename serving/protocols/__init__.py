"""What travels over the wire, as pure functions between bytes and arrays; nothing here waits or computes."""
