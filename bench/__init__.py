"""One question a file; results as JSON under results/."""
