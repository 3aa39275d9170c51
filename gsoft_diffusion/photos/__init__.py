"""Reading what people bring: pictures with captions and masks, and how they are cropped."""
