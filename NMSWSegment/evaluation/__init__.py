"""How good a bundle is: metrics, and scores on labelled data."""
