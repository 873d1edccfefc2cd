"""Random training samples, drawn from labelled cases and from anatomies."""
