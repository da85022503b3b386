"""Training loops: generators of events that know no files, screens or clusters."""
