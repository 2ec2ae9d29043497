"""Video to grouped patch tokens and back."""
