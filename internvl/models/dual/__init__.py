"""InternVL-14B: vision tower, QLLaMA, features, captions."""
