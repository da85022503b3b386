"""What is timed, beside what. Nothing here is a test, and no test asserts a time."""
