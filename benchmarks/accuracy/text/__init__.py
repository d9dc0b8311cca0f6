"""The suite on real text: what Python packages and the Unicode standard say, read by a pretrained encoder."""
