"""What the programs ask for: an answer in a form of which a small model can be held to every letter."""

from typing import Literal

from pydantic import BaseModel


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Paris", "Oslo", "Lima"]
    unit: Literal["celsius", "fahrenheit"]
