"""Gates: tests that fail when a patch loses quality or speed."""
