"""The network as a service on Ray Serve; the clusters' own files lie beside it."""
