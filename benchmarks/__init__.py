"""Speed and memory against mergekit and the raw floor: `make bench`, see README.md here."""
