"""Where results go: folders, live modules, candidates; manifests and their check."""
