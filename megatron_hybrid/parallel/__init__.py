"""How one model and one batch are split over ranks."""
