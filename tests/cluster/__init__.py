"""The proof: a cluster of hosts on one machine, the user's road on it, and faults."""
