"""What is written for other people's servers: Triton repositories, Kubernetes manifests."""
