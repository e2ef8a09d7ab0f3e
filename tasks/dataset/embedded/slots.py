"""Values that fill the embedded dataset's requests: what a person writes, and what the call must carry.

Every slot draws ``(surface, value)``: ``("14 March 2026", "2026-03-14")``. Closed vocabularies are divided
once, by position, between training and test, so that a test request speaks of places, people and things that
training never mentions; enums and number ranges are shared, since a schema fixes them.
"""

import calendar
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any, Literal, Protocol

Split = Literal["train", "test"]
Drawn = tuple[str, Any]

TEST_SHARE_OF_VALUES = 4
"""Every fourth value of a vocabulary belongs to the test split."""


class Slot(Protocol):
    """One kind of argument: its JSON Schema and a way to draw a surface form with its value."""

    @property
    def schema(self) -> dict[str, Any]: ...

    def draw(self, rng: random.Random, split: Split) -> Drawn: ...


@dataclass(frozen=True)
class Words:
    """A free string from a vocabulary, written in the request exactly as the call must carry it."""

    vocabulary: list[str]

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string"}

    def of(self, split: Split) -> list[str]:
        """The words that belong to ``split``."""
        is_test = split == "test"
        return [w for i, w in enumerate(self.vocabulary) if (i % TEST_SHARE_OF_VALUES == 3) == is_test]

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        word = rng.choice(self.of(split))
        return word, word


@dataclass(frozen=True)
class Quoted:
    """A sentence of its own, which the request puts in quotation marks and the call carries without."""

    sentences: Words

    @property
    def schema(self) -> dict[str, Any]:
        return self.sentences.schema

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        surface, value = self.sentences.draw(rng, split)
        return f'"{surface}"', value


@dataclass(frozen=True)
class Choice:
    """An enum: the value, and the ways people say it (the value itself where none is given)."""

    values: Mapping[str, Sequence[str]]

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.values)}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        value = rng.choice(list(self.values))
        return rng.choice(self.values[value] or [value]), value


@dataclass(frozen=True)
class Integer:
    """A whole number from ``low`` to ``high`` in steps of ``step``."""

    low: int
    high: int
    step: int = 1

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        value = rng.randrange(self.low, self.high + 1, self.step)
        return str(value), value


@dataclass(frozen=True)
class Number:
    """A decimal number with up to ``decimals`` places."""

    low: float
    high: float
    decimals: int

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        value = round(rng.uniform(self.low, self.high), rng.randint(1, self.decimals))
        return str(value), value


@dataclass(frozen=True)
class Date:
    """A day of 2026 or 2027, said in one of two ways and carried as ISO 8601."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "format": "date"}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        day = date(2026, 1, 1) + timedelta(days=rng.randrange(730))
        surface = rng.choice([day.isoformat()] * 5 + [f"{day.day} {calendar.month_name[day.month]} {day.year}"])
        return surface, day.isoformat()


@dataclass(frozen=True)
class Time:
    """A time of day on the quarter hour, 24-hour clock."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "pattern": "^([01][0-9]|2[0-3]):[0-5][0-9]$"}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        surface = f"{rng.randrange(7, 23):02d}:{rng.choice(['00', '15', '30', '45'])}"
        return surface, surface


@dataclass(frozen=True)
class Several:
    """Two or three different values of another slot, as an array."""

    item: Slot
    low: int = 2
    high: int = 3

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.item.schema}

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        drawn: dict[str, Any] = {}
        wanted = rng.randint(self.low, self.high)
        while len(drawn) < wanted:
            surface, value = self.item.draw(rng, split)
            drawn[surface] = value
        surfaces = list(drawn)
        return ", ".join(surfaces[:-1]) + " and " + surfaces[-1], list(drawn.values())


@dataclass(frozen=True)
class Record:
    """A nested object; ``phrase`` says how its fields are written in the request."""

    fields: Mapping[str, Slot]
    phrase: str

    @property
    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "properties": {name: slot.schema for name, slot in self.fields.items()},
            "required": list(self.fields),
            "additionalProperties": False,
        }

    def draw(self, rng: random.Random, split: Split) -> Drawn:
        drawn = {name: slot.draw(rng, split) for name, slot in self.fields.items()}
        surface = self.phrase.format(**{name: surface for name, (surface, _) in drawn.items()})
        return surface, {name: value for name, (_, value) in drawn.items()}


def _words(text: str) -> Words:
    return Words([word.strip() for word in text.split(",")])


# Values are common words on purpose: a 135M model must learn to call, not to spell.
PLACE = _words(
    "Paris, Boston, Chicago, London, Rome, Oxford, Cambridge, Washington, France, Germany, Italy, Spain, China, Japan, "
    "India, Canada, Mexico, Egypt, Israel, Russia, Australia, California, Texas, Florida, Virginia, England, Brazil, "
    "Iran, Hungary, Pakistan, Africa, Europe, Asia, America, Britain, Madison"
)
PERSON = _words(
    "Anna, Ben, John, Mary, James, Sarah, David, Daniel, Peter, Alice, Bob, Henry, George, William, Thomas, Robert, "
    "Michael, Richard, Paul, Mark, Maria, Jane, Emily, Anne, Alex, Sam, Max, Jack, Tom, Tim, Jim, Adam, Simon, Martin, "
    "Frank, Louis, Charles, Edward, Joseph, Samuel, Jacob, Chris, Matt, Nick, Dan, Ken, Ray, Carl, Ali, Rose, Lily, Jean"
)
SURNAME = _words(
    "Smith, Johnson, Brown, Jones, Miller, Davis, Wilson, Anderson, Taylor, Clark, Lewis, Young, King, Scott, Hill, "
    "Green, Adams, Collins, Cook, Bell, Price, Wood, Ross, Long, White"
)
FULL_NAME = Words([f"{f} {s}" for f, s in zip(PERSON.vocabulary, SURNAME.vocabulary * 2, strict=False)])
TOPIC = _words(
    "budget, website, security, training, customer, travel, safety, data, design, research, energy, health, education, "
    "food, traffic, housing, climate, tax, quality, testing, support, network, software, storage"
)
PRODUCT = _words(
    "phone, game, clock, chair, table, camera, watch, bag, hat, coat, shirt, pen, bed, cup, plate, radio, computer, "
    "printer, mouse, monitor, ball, ring, book, car"
)
GROCERY = _words(
    "water, milk, bread, rice, salt, sugar, apples, beans, corn, fish, soup, oil, fruit, nuts, meat, berries, wine, orange"
)
SONG = _words(
    "Blue River, Night Train, Golden Hour, Paper Moon, Silver Line, Red Ball, Summer Rain, Slow Dance, City Lights, "
    "Wild Horse, Winter Road, Glass House, Lost Letter, Cold Water, Open Sky, Black Bird, White Room, First Light, "
    "Old Friend, Big World, Free Time, High Ground, Long Way, Deep Sea"
)
ARTIST = FULL_NAME
PLAYLIST = _words(
    "Focus, Sunday, Sleep, Study, Summer, Winter, Spring, Night, Love, Rock, Pop, Travel, Home, Work, Energy"
)
ROOM = _words("kitchen, bedroom, bathroom, office, garage, basement, hall, library, garden, nursery, studio, lobby")
CUISINE = {"french": ["French"], "italian": ["Italian"], "japanese": ["Japanese"], "chinese": ["Chinese"]}
COMPANY = _words("Apple, Amazon, Shell, Park, Mill, Lake, Garden, Union, Star, Crown, King, River")
TICKER = _words("IBM, AMD, SAP, NASA, CNN, GM, GE, BP, HP, FDA, GPS, NBC")
SUBJECT = _words(
    "math, science, history, biology, physics, economics, statistics, music, art, law, medicine, engineering, geometry, "
    "ecology, logic, poetry"
)
BOOK = _words(
    "The Silent Sea, The Long Road, The Last Ship, The Old House, The Red Door, The Stone Garden, The Dark River, "
    "The White King, The Glass Key, The Night Train, The Black Cat, The Far Shore, The Lost City, The Green Hill"
)
TASK = _words(
    "call the doctor, water the plants, pay the rent, feed the cat, walk the dog, clean the house, buy new shoes, "
    "check the oil, send the letter, read the report, wash the car, close the window, make the bed, test the alarm, "
    "pay the bill, charge the phone, visit the bank, cut the grass"
)
EVENT = _words("class, party, visit, call, game, training, review, trip, exam, show, race, walk, service, session")
NOTE = _words(
    "call me later, I am late, see you soon, the train is late, we are home, the car is here, come back soon, "
    "happy birthday, good luck, the door is open, we won the game, I need help, the water is cold, the test went well, "
    "wait for me, no school today, all is well"
)
STREET = _words(
    "Park, King, Church, School, Mill, Hill, River, Lake, Forest, High, Main, Market, Spring, Center, Station"
)
LANGUAGE = _words("English, French, German, Spanish, Japanese, Italian, Arabic, Dutch, Greek, Russian, Chinese, Latin")
PHRASE = _words(
    "good morning, hello, good night, how are you, where are you, open the door, I am hungry, we are lost, "
    "the food is good, what time is it, my name is Sam, help me, I like music, we need water, this is great, thank you"
)
MEDICINE = _words("iron, vitamin D, aspirin, insulin, zinc, calcium, oxygen, penicillin")
EXHIBIT = _words(
    "space, war, peace, nature, history, science, fashion, design, women, children, animals, fish, plants, trees, cars, ships"
)

SLOTS: dict[str, Slot] = {
    "place": PLACE,
    "person": PERSON,
    "people": Several(PERSON),
    "full_name": FULL_NAME,
    "topic": TOPIC,
    "product": PRODUCT,
    "groceries": Several(GROCERY),
    "song": SONG,
    "artist": ARTIST,
    "playlist": PLAYLIST,
    "room": ROOM,
    "company": COMPANY,
    "ticker": TICKER,
    "tickers": Several(TICKER),
    "subject": SUBJECT,
    "book": BOOK,
    "task": TASK,
    "event": EVENT,
    "note": Quoted(NOTE),
    "language": LANGUAGE,
    "phrase": Quoted(PHRASE),
    "medicine": MEDICINE,
    "exhibit": EXHIBIT,
    "address": Record({"number": Integer(1, 99), "street": STREET}, "{number} {street} Street"),
    "passenger": Record({"name": FULL_NAME, "age": Integer(18, 80)}, "{name}, aged {age}"),
    "date": Date(),
    "time": Time(),
    "days": Integer(2, 10),
    "minutes": Integer(5, 90, 5),
    "count": Integer(2, 9),
    "percent": Integer(5, 100, 5),
    "degrees": Integer(16, 26),
    "amount": Integer(10, 900, 10),
    "price": Number(5, 300, 2),
    "weight": Number(45, 120, 1),
    "loan": Integer(1000, 90000, 1000),
    "years": Integer(2, 30),
    "order_number": Integer(10000, 99999),
    "channel": Integer(1, 60),
    "currency": Choice({"USD": [], "EUR": [], "GBP": [], "JPY": []}),
    "priority": Choice({"low": [], "medium": [], "high": []}),
    "light_color": Choice({"red": [], "blue": [], "green": [], "white": []}),
    "sport": Choice({"running": ["run"], "cycling": ["bike ride"], "swimming": ["swim"], "walking": ["walk"]}),
    "level": Choice({"beginner": [], "intermediate": [], "advanced": []}),
    "leave_type": Choice({"vacation": [], "sick": [], "parental": []}),
    "file_format": Choice({"pdf": ["PDF", "pdf"], "csv": ["CSV", "csv"], "xlsx": ["XLSX", "xlsx"]}),
    "period": Choice({"day": [], "week": [], "month": [], "year": []}),
    "cuisine": Choice(CUISINE),
}
"""Slot name, as parameters in ``tools.yaml`` name it -> how it is drawn."""
