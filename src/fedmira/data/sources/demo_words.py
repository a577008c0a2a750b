"""The words that the rows of the demo are made of, and the mappings that its families share."""

from __future__ import annotations

__all__ = [
    "CITIES",
    "DAYS",
    "DEEDS",
    "DEPARTMENTS",
    "DESKS",
    "GOODS",
    "GROUPS",
    "GROUP_OF",
    "MONTHS",
    "NAMES",
    "OFFICES",
    "PACKS",
    "SHELVES",
    "THINGS",
]

NAMES = """Ada Bruno Clara David Elena Farid Grace Hugo Ines Jonas
Karin Leo Mira Nadia Omar Paula Quinn Rosa Stefan Tara""".split()
CITIES = """Porto Lyon Oslo Graz Turin Ghent Malaga Bergen
Leeds Krakow Riga Split Basel Cork Tampere Aarhus""".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = """January February March April May June
July August September October November December""".split()
GOODS = """apples bricks candles carpets chairs coffee cotton flour glass honey
lamps olives paper rice shoes soap tiles toys wine wool""".split()
PACKS = "boxes crates bags pallets barrels".split()
THINGS = (
    "the report|the invoice|the contract|the photos|the keys|the samples|the tickets|"
    "the drawings|the price list|the letter"
).split("|")
DEEDS = "send|sign|check|print|translate|copy|return|collect".split("|")

DEPARTMENTS = {
    "cardiology": [
        "chest pain",
        "a racing heart",
        "an irregular pulse",
        "tightness in the chest",
        "swollen ankles",
    ],
    "dermatology": [
        "an itchy rash",
        "dry red skin",
        "a dark mole",
        "blisters on the hands",
        "hives",
    ],
    "orthopedics": [
        "a sore knee",
        "a twisted ankle",
        "a stiff shoulder",
        "lower back pain",
        "a swollen wrist",
    ],
    "neurology": [
        "a severe headache",
        "numb fingers",
        "dizziness",
        "trembling hands",
        "memory loss",
    ],
    "ophthalmology": [
        "blurred vision",
        "a red eye",
        "double vision",
        "watery eyes",
        "flashes of light",
    ],
    "pulmonology": [
        "a dry cough",
        "shortness of breath",
        "wheezing",
        "coughing at night",
        "noisy breathing",
    ],
}
DESKS = {
    "cards": [
        "my card was swallowed by the machine",
        "my card does not work abroad",
        "I forgot my pin",
        "my new card has not arrived",
        "the card chip is broken",
    ],
    "fraud": [
        "I see a payment I never made",
        "someone used my account",
        "a stranger asked for my password",
        "I got a strange link",
        "money is missing",
    ],
    "loans": [
        "I want to borrow money for a house",
        "I would like to pay my loan back early",
        "my interest rate seems wrong",
        "I need credit for a car",
        "my instalment is too high",
    ],
    "transfers": [
        "my transfer did not arrive",
        "I sent money to the wrong person",
        "I want to pay a bill abroad",
        "my standing order failed",
        "a payment was booked twice",
    ],
    "accounts": [
        "I want to open an account",
        "please close my account",
        "I moved to a new address",
        "my name has changed",
        "I need a statement",
    ],
}
SHELVES = {
    "garden": ["a rake", "tulip bulbs", "a watering can", "a hedge trimmer"],
    "kitchen": ["a frying pan", "a whisk", "a set of plates", "a kettle"],
    "office": ["a stapler", "a desk lamp", "a box of pens", "a notebook"],
    "sports": ["a football", "a yoga mat", "running socks", "a tennis racket"],
}

GROUPS = {
    "food": ["apples", "coffee", "flour", "honey", "olives", "rice", "wine"],
    "textiles": ["carpets", "cotton", "shoes", "wool"],
    "building": ["bricks", "glass", "tiles"],
    "household": ["candles", "chairs", "lamps", "paper", "soap", "toys"],
}
GROUP_OF = {goods: group for group, members in GROUPS.items() for goods in members}
OFFICES = {
    "finance": ["the invoice", "the price list", "the refund", "the budget"],
    "legal": ["the contract", "the permit", "the licence", "the patent"],
    "travel": ["the tickets", "the hotel", "the visa", "the rental car"],
    "design": ["the drawings", "the photos", "the logo", "the brochure"],
    "facility": ["the keys", "the heating", "the broken window", "the parking space"],
}
