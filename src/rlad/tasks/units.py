"""Units of measurement in answers."""

from fractions import Fraction

from rlad.tasks.notation import words

Unit = tuple[str, Fraction]
"""The measured quantity, and the unit's size in the quantity's first unit"""

_TABLE = {
    "time": {
        "1": "s sec secs second seconds",
        "60": "min mins minute minutes",
        "3600": "h hr hrs hour hours",
        "86400": "day days",
        "604800": "week weeks wk wks",
        "1/1000": "ms millisecond milliseconds",
    },
    "months": {"1": "month months", "12": "year years yr yrs"},
    "length": {
        "1": "m meter meters metre metres",
        "1000": "km kilometer kilometers kilometre kilometres",
        "1/10": "dm decimeter decimeters",
        "1/100": "cm centimeter centimeters centimetre centimetres",
        "1/1000": "mm millimeter millimeters millimetre millimetres",
        "254/10000": "inch inches",
        "3048/10000": "ft foot feet",
        "9144/10000": "yd yds yard yards",
        "1609344/1000": "mi mile miles",
    },
    "mass": {
        "1": "g gram grams",
        "1000": "kg kgs kilogram kilograms kilo kilos",
        "1/1000": "mg milligram milligrams",
        "1000000": "tonne tonnes",
        "45359237/100000": "lb lbs pound pounds",
        "45359237/1600000": "oz ounce ounces",
    },
    "volume": {
        "1": "l liter liters litre litres",
        "1/100": "cl centiliter centiliters centilitre centilitres",
        "1/1000": "ml milliliter milliliters millilitre millilitres",
        "3785411784/1000000000": "gal gallon gallons",
    },
    "speed": {
        "1": "m/s mps",
        "10/36": "km/h kph kmh kmph",
        "1609344/3600000": "mph miles/h",
    },
    "dollars": {"1": "$ us$ usd dollar dollars buck bucks", "1/100": "cent cents \N{CENT SIGN}"},
    "euros": {"1": "\N{EURO SIGN} eur euro euros"},
    "pounds sterling": {"1": "\N{POUND SIGN} gbp", "1/100": "pence"},
    "yen": {"1": "\N{YEN SIGN} jpy yen"},
    "rupees": {"1": "\N{INDIAN RUPEE SIGN} inr rupee rupees rs"},
    "percent": {"1": "% percent pct percentage"},
    "degrees": {"1": "\N{DEGREE SIGN} deg degree degrees"},
    "force": {"1": "N newton newtons", "1000": "kn kilonewton kilonewtons"},
    "energy": {"1": "J joule joules", "1000": "kj kilojoule kilojoules"},
    "electric power": {"1": "W watt watts", "1000": "kw kilowatt kilowatts"},
    "voltage": {"1": "V volt volts"},
    "temperature": {"1": "K kelvin kelvins"},
    "pressure": {"1": "pa pascal pascals", "1000": "kpa"},
    "frequency": {"1": "hz hertz", "1000": "khz"},
    "radians": {"1": "rad radian radians"},
    "degrees Celsius": {"1": "celsius \N{DEGREE SIGN}c"},
    "degrees Fahrenheit": {"1": "fahrenheit \N{DEGREE SIGN}f"},
}
UNITS: dict[str, Unit] = {
    name: (dimension, Fraction(factor))
    for dimension, sizes in _TABLE.items()
    for factor, names in sizes.items()
    for name in words(names)
}
MULTIPLIERS = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 1000,
    "lakh": 10**5,
    "crore": 10**7,
    "million": 10**6,
    "mio": 10**6,
    "mln": 10**6,
    "mn": 10**6,
    "billion": 10**9,
    "bn": 10**9,
    "mrd": 10**9,
    "trillion": 10**12,
}
LARGE_NUMBERS = frozenset(
    words(
        "quadrillion quintillion sextillion septillion octillion nonillion decillion googol myriad "
        "mill mil bln tn trn bil grand score gross"
    )
)
"""Words for large numbers that cannot be read"""


def known_unit(text: str) -> Unit | None:
    """Look up a unit by one of its names."""
    name = text.strip(" .")
    # Mm is not millimetre, and Mg not milligram.
    if len(name) == 2 and name[0] == "M" and name.casefold() in ("mg", "mm", "ml", "ms"):
        return None
    return UNITS.get(name if len(name) == 1 and name != "L" else name.casefold())
