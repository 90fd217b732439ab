"""Figures. Needs the extra `report`."""
