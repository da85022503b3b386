"""Many runs at once: ablations and sweeps."""
