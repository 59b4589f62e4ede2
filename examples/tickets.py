"""A seeded world of customer-support tickets.

A ticket states independent facts: product, problem, request, urgency, anger, customer value and impact. Each fact is worded by sentence
templates, in which `[a|b]` is one alternative at random and `{p}` the product. Every fact has `told` wordings, which the documents that
the base model is trained on use, and `held` wordings, which only the example rows use.
"""

import random
import re
from dataclasses import dataclass
from functools import cache

LEVELS = ("low", "medium", "high")
GRADED = ("urgency", "anger", "value", "impact")
CHANNELS = ("email", "chat", "phone", "web", "app")
REGIONS = ("emea", "amer", "apac")


@dataclass(frozen=True)
class Wordings:
    """Sentence templates of one value of one fact."""

    told: tuple[str, ...]
    held: tuple[str, ...]


def _w(told: list[str], held: list[str]) -> Wordings:
    return Wordings(tuple(told), tuple(held))


PRODUCTS = (
    "router",
    "laptop",
    "printer",
    "tablet",
    "camera",
    "headphones",
    "smart watch",
    "coffee machine",
    "monitor",
    "keyboard",
    "doorbell",
    "vacuum cleaner",
    "speaker",
    "phone",
    "projector",
    "scanner",
)
"""Products that the base model has read about."""

NEW_PRODUCTS = ("thermostat", "docking station", "air purifier")
"""Products that appear in later batches only."""

WORDINGS: dict[str, dict[str, Wordings]] = {
    "urgency": {
        "low": _w(
            [
                "There is no [rush|hurry][| at all].",
                "[Please take|Take] your time[| with this].",
                "[Answer|Reply] whenever you [can|like].",
                "It can wait [until next month|a few weeks].",
                "Any time [next month|this quarter] is fine.",
            ],
            [
                "Please answer whenever you have time, no hurry.",
                "This can wait, take a few weeks.",
                "No rush, next month is fine.",
            ],
        ),
        "medium": _w(
            [
                "[Please answer|A reply] [this week|by Thursday|before Friday] would be [good|nice].",
                "I need [it|this] [in the next days|by the end of the week].",
                "It should be [done|solved|sorted] [soon|this week].",
                "[Please |]get back to me [soon|in a few days].",
                "I [hope|expect] to hear from you [this week|within a few days].",
            ],
            [
                "Please see that it is solved before Friday.",
                "I need a reply in a few days.",
                "It would be good to have this done by the end of the week.",
            ],
        ),
        "high": _w(
            [
                "I need [it|this|a solution] [today|right now|within the hour].",
                "This is [an emergency|extremely urgent|very urgent].",
                "[Act|Answer|Help me] [immediately|right now|at once].",
                "It [must|has to] be [solved|done] [today|tonight|within the hour].",
                "This [cannot|can't] wait [another hour|until tomorrow].",
            ],
            [
                "Please act today, it is urgent.",
                "I must have a solution immediately.",
                "It is an emergency and has to be solved at once.",
            ],
        ),
    },
    "anger": {
        "low": _w(
            [
                "[Thank you|Thanks] for [the kind|your friendly|the quick] help[| so far].",
                "I am [very |really |]happy with [your service|your team].",
                "You are [a great|a friendly|the best] team.",
                "[Best wishes|All the best] to [all of you|your team].",
                "I [have always liked|really like] [your shop|your service].",
            ],
            [
                "Thanks, your team is so friendly.",
                "I am happy and wish you all the best.",
                "Your service has always been great.",
            ],
        ),
        "medium": _w(
            [
                "I am [a bit|somewhat|a little] [disappointed|annoyed].",
                "This is [somewhat|rather|a little] annoying.",
                "I [expected|hoped for] [more|better].",
                "I am not [so|very|too] pleased.",
                "[That|This] is [rather|a bit] disappointing.",
            ],
            [
                "I must say I am a little disappointed.",
                "It is rather annoying, I hoped for more.",
                "I am not too pleased and expected better.",
            ],
        ),
        "high": _w(
            [
                "This is [outrageous|a disgrace|unacceptable].",
                "I am [furious|so angry|sick of you].",
                "[You are the|This is the] worst [company|service] [ever|in the world].",
                "[What a|Such a] [disgrace|scandal|shame]!",
                "I have [never|never ever] been treated [so badly|like this]!",
            ],
            [
                "I am so angry, it is a scandal!",
                "You are a disgrace, the worst ever!",
                "I am furious, nobody should be treated so badly.",
            ],
        ),
    },
    "value": {
        "low": _w(
            [
                "I am on the free plan.",
                "This is my first order[| here].",
                "I am [new here|a new customer].",
                "I [only |just ]signed up [this week|yesterday].",
            ],
            [
                "I am a new customer on the free plan.",
                "It is my first order with you.",
            ],
        ),
        "medium": _w(
            [
                "I have been a [member|customer] for [a year|two years].",
                "We [have|are on] the [team|standard] plan.",
                "This is my [fourth|fifth|third] order[| here].",
                "I have ordered [a few times|now and then].",
            ],
            [
                "We have been on the standard plan for a year.",
                "I am a member and order now and then.",
            ],
        ),
        "high": _w(
            [
                "We [have|signed] the enterprise [contract|plan].",
                "I am a [gold|platinum|VIP] [member|customer].",
                "We spend [thousands|a fortune] with you[| every month].",
                "We own [two|three|five] hundred licences.",
            ],
            [
                "I am a VIP with the enterprise plan.",
                "As a platinum member I spend thousands.",
            ],
        ),
    },
    "impact": {
        "low": _w(
            [
                "[Only I am|It is only me who is] affected.",
                "I [can|still can] [work|live] without it.",
                "[Nobody else|No one else] [has|sees] this.",
                "[Everything else|All the rest] [works|runs] [fine|well].",
            ],
            [
                "Only I am affected and I can work.",
                "No one else has it, only me.",
                "Everything else runs, I can live without it.",
            ],
        ),
        "medium": _w(
            [
                "[Two|Three|Some] [colleagues|people] have the same [trouble|problem].",
                "[My|Our] [team|family] [is|works] slower because of it.",
                "It [slows down|disturbs] [my|our] work.",
                "We work with [half|a part] of [it|our tools].",
            ],
            [
                "Some people in my team are slower now.",
                "Three colleagues say it disturbs our work.",
                "It slows down half of our team.",
            ],
        ),
        "high": _w(
            [
                "[The whole|Our whole|The entire] [company|office|shop] is down.",
                "[Nobody|No one] [here |in the office |]can work.",
                "[All|All our] [stores|systems|customers] are [offline|blocked].",
                "We had to [close|shut] the [shop|office].",
                "[Nothing|Not one system] works [here|in our shop] any more.",
            ],
            [
                "The entire office is blocked and nobody can work.",
                "All systems are down and the shop is shut.",
                "Our whole company is offline.",
            ],
        ),
    },
    "problem": {
        "does not turn on": _w(
            [
                "[My|The|Our] {p} [does not|will not|won't] turn on[| any more| since yesterday].",
                "The {p} stays [completely |]dark when I press the [power |]button.",
                "I cannot get [my|the|this] {p} to [start|power up].",
                "[My|The] {p} is [dead|totally dead] and [shows no light|does not start].",
            ],
            ["When I press the power button, the {p} does not start.", "The new {p} shows no light and won't power up."],
        ),
        "arrived damaged": _w(
            [
                "[My|The] {p} arrived [damaged|broken|with a crack].",
                "The box was [crushed|torn] and the {p} [inside |]is damaged.",
                "There is a [big|long|deep] [crack|scratch] on the {p} you [sent|delivered].",
                "[My|The] {p} was broken when I opened the [box|parcel].",
            ],
            ["I opened the parcel and found a {p} with a crack.", "The {p} you sent was crushed in its box."],
        ),
        "not delivered": _w(
            [
                "[My|The] {p} has [not|never|still not] arrived.",
                "I am still waiting for the {p} I ordered [last week|two weeks ago|in March].",
                "[Tracking|The courier] says my {p} is [lost|still on the way].",
                "Where is the {p} that I [ordered|paid for]?",
            ],
            ["I ordered a {p} two weeks ago and it has still not arrived.", "The courier never came with my {p}."],
        ),
        "charged twice": _w(
            [
                "I was [charged|billed] twice for [my|the|one] {p}.",
                "[My card|My bank] shows two payments for the {p}.",
                "You took the money for the {p} [two times|twice].",
                "The invoice [lists|shows] the {p} [twice|two times].",
            ],
            ["There are two payments for one {p} on my card.", "My bank says you billed the {p} twice."],
        ),
        "login locked": _w(
            [
                "I cannot log in to [register|set up] my {p}.",
                "[My|The] account for the {p} is [locked|blocked].",
                "The {p} app [rejects|refuses] my password.",
                "The login code for my {p} never [comes|arrives in my inbox].",
            ],
            ["My password is refused when I log in to the {p} account.", "The app says that the account of my {p} is locked."],
        ),
        "keeps disconnecting": _w(
            [
                "[My|The|Our] {p} keeps [disconnecting|losing the connection].",
                "The {p} drops the [wifi|connection] [every few minutes|all the time].",
                "[My|The] {p} loses the [signal|wifi] again and again.",
                "Every [ten minutes|hour] the {p} goes offline[| again].",
            ],
            ["The connection of my {p} drops every few minutes.", "My {p} goes offline again and again."],
        ),
        "wrong item": _w(
            [
                "I ordered a {p} but got [something else|another item|the wrong item].",
                "You sent [the wrong|another] {p}[| than the one I ordered].",
                "[This|It] is not the {p} [that |]I ordered.",
                "The {p} in the box is [the wrong model|another model|the wrong colour].",
            ],
            ["The {p} you sent is another model than I ordered.", "I got the wrong {p} in the box."],
        ),
        "overheats": _w(
            [
                "[My|The] {p} gets [far |much |]too hot[| after ten minutes].",
                "The {p} [overheats|is overheating] [every time|all the time].",
                "[My|The] {p} smells of [smoke|burning plastic].",
                "I burned my [hand|finger] on the {p}, it is so hot.",
            ],
            ["After ten minutes my {p} is so hot that it smells.", "There is smoke and the {p} gets hot."],
        ),
    },
    "request": {
        "a refund": _w(
            [
                "[Please|Could you|Kindly] [refund me|give me my money back|return the money].",
                "I [want|would like] [a full refund|my money back|a refund].",
                "[Send|Put] the money back [on my card|to my account].",
            ],
            ["I would like the money back on my card.", "Please give me a full refund."],
        ),
        "a replacement": _w(
            [
                "[Please|Could you] send [me |]a new one[| instead].",
                "I [want|would like] [a replacement|a new one].",
                "[Can|Could] you [exchange|swap] it[| for a new one]?",
            ],
            ["Could you send a replacement instead?", "I want it exchanged for a new one."],
        ),
        "a repair": _w(
            [
                "[Please|Can you|Could you] [repair|fix] it[| for me].",
                "I [want|would like] [it repaired|it fixed|a repair].",
                "[Can|Could] a technician [come and fix it|look at it]?",
            ],
            ["Please let a technician repair it.", "Could you look at it and fix it?"],
        ),
        "a callback": _w(
            [
                "[Please|Can you|Could you] [call me back|give me a call|phone me].",
                "I [want|would like] [a callback|someone to call me].",
                "[Ring|Call] me on [my mobile|the number in my account].",
            ],
            ["I want you to phone me on my mobile.", "Please ring me, I would like to talk."],
        ),
        "a cancellation": _w(
            [
                "[Please|Could you] cancel [my order|the order|everything].",
                "I [want|would like] to cancel[| my order| the contract].",
                "[Stop|End] [my subscription|the contract][|, please].",
            ],
            ["Please end my contract and cancel everything.", "I would like to stop the subscription."],
        ),
        "an explanation": _w(
            [
                "[Please|Could you] explain [what happened|how this can be|why].",
                "I [want|would like] [an explanation|to understand why].",
                "[Tell|Show] me [what went wrong|how this could happen].",
            ],
            ["Could you tell me why this happened?", "Please explain to me what went wrong."],
        ),
    },
}

SILENT = {("urgency", "low"): 0.5, ("anger", "low"): 0.5, ("value", "low"): 0.3, ("impact", "low"): 0.3}
"""How often a fact at this level is not mentioned at all."""

ASIDES = (
    "I called [before|last week|on Monday].",
    "See the attached [photo|file].",
    "The order number is {k}.",
    "I bought it [in May|last month|as a gift].",
    "I already tried a [restart|reset].",
    'The [screen|app] [says|shows] "error {e}".',
    'Your [page|shop] says "in stock"; [I wonder|is that right]?',
    "[Model|Type] {e}-B, bought in your [café|shop] in [Köln|Québec|São Paulo|Málaga].",
)
GREETINGS = ("Hello,", "Hi,", "Hi there,", "Good morning,", "Dear team,", "Dear support,")
CLOSINGS = ("Regards, {n}", "Thanks, {n}", "{n}", "Yours, {n}", "Kind regards\n{n}")
NAMES = {
    "emea": [
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Felix",
        "Greta",
        "Hugo",
        "Jürgen",
        "Karim",
        "Lena",
        "Zoë",
        "Noémie",
        "Olga",
        "Søren",
        "Yusuf",
    ],
    "amer": ["Alice", "José", "Emily", "Jacob", "Madison", "Tyler", "Renée", "Luis", "Ashley", "Diego", "Grace", "Logan"],
    "apac": ["Aiko", "Wei", "Priya", "Hana", "Arjun", "Mei", "Kenji", "Nia", "Ravi", "Linh", "Jin", "Tara"],
}
CALL_NOTES = ("Caller:", "Note of a call:", "Customer on the phone says:")
EMOJI = ("👋", "📦", "🔧", "🤖")


@dataclass(frozen=True)
class Mix:
    """How often each value of a fact occurs, and how it is worded."""

    urgency: tuple[float, float, float] = (4, 3, 3)
    anger: tuple[float, float, float] = (4, 3, 3)
    value: tuple[float, float, float] = (4, 3, 3)
    impact: tuple[float, float, float] = (4, 3, 3)
    products: tuple[str, ...] = PRODUCTS
    held: float = 0.0
    """Share of sentences that use a held wording."""


@dataclass(frozen=True)
class Ticket:
    facts: dict[str, str]
    text: str


@cache
def _alternatives(template: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(part.split("|")) if i % 2 else (part,) for i, part in enumerate(re.split(r"\[([^\]]*)\]", template)))


def expand(rng: random.Random, template: str) -> str:
    """The template with one alternative chosen in each bracket."""
    return "".join(options[0] if len(options) == 1 else rng.choice(options) for options in _alternatives(template))


def higher(*levels: str) -> str:
    """The highest of some levels."""
    return max(levels, key=LEVELS.index)


def _misspell(rng: random.Random, text: str) -> str:
    words = text.split(" ")
    for _ in range(rng.randint(1, 2)):
        i = rng.randrange(len(words))
        word = words[i]
        if len(word) > 4 and word.isalpha():
            j = rng.randrange(1, len(word) - 2)
            a, b = word[j], word[j + 1]
            words[i] = word[:j] + rng.choice((b + a, b, a + a + b)) + word[j + 2 :]
    return " ".join(words)


def curl(text: str) -> str:
    """Typewriter quotes made typographic, as word processors do."""
    return re.sub(r'"([^"]*)"', "“\\1”", text).replace("'", "’")


def _write(rng: random.Random, sentences: list[str], channel: str, region: str) -> str:
    """One message, in the manner of its channel."""
    name = rng.choice(NAMES[region])
    if channel == "email":
        body = "\n".join(sentences) if rng.random() < 0.15 else " ".join(sentences)
        gap = rng.choice(("\n", "\n\n", " "))
        if rng.random() < 0.6:
            body = rng.choice(GREETINGS) + gap + body
        if rng.random() < 0.6:
            body += gap + rng.choice(CLOSINGS).format(n=name)
    elif channel == "chat":
        body = " ".join(sentences)
        if rng.random() < 0.4:
            body = body.lower()
        if rng.random() < 0.2:
            body = body.replace(". ", " - ").rstrip(".")
    elif channel == "phone":
        body = " ".join(sentences)
        if rng.random() < 0.5:
            body = f"{rng.choice(CALL_NOTES)} {body}"
    elif channel == "web":
        body = " ".join(sentences)
        if rng.random() < 0.3:
            body += " " + name
    else:
        body = " ".join(sentences)
        if rng.random() < 0.3:
            body += " " + rng.choice(EMOJI)
    if rng.random() < 0.2:
        body = _misspell(rng, body)
    return curl(body) if rng.random() < 0.15 else body


def ticket(rng: random.Random, mix: Mix, channel: str, region: str) -> Ticket:
    """One ticket with its facts."""
    facts = {fact: rng.choices(LEVELS, getattr(mix, fact))[0] for fact in GRADED}
    facts["problem"] = rng.choice(list(WORDINGS["problem"]))
    facts["request"] = rng.choice(list(WORDINGS["request"]))
    facts["product"] = rng.choice(mix.products)
    sentences = []
    for fact, wordings in WORDINGS.items():
        if rng.random() < SILENT.get((fact, facts[fact]), 0.0):
            continue
        choice = wordings[facts[fact]]
        sentences.append(expand(rng, rng.choice(choice.held if rng.random() < mix.held else choice.told)))
    if rng.random() < 0.25:
        sentences.append(
            expand(rng, rng.choice(ASIDES)).replace("{k}", str(rng.randint(10000, 99999))).replace("{e}", str(rng.randint(2, 99)))
        )
    rng.shuffle(sentences)
    sentences = [s.replace("{p}", facts["product"]) for s in sentences]
    return Ticket(facts, _write(rng, sentences, channel, region))


MAIL_SENTENCES = ("You can write to {x}.", "My address is {x}.", "Mail: {x}")
PHONE_SENTENCES = ("My number is {x}.", "I can be reached on {x}.", "Tel. {x}")
CARD_SENTENCES = ("I paid with card {x}.", "The card was {x}.", "Card number {x}")


def mail(rng: random.Random, region: str) -> str:
    """A mail address in a domain reserved for examples."""
    name = rng.choice(NAMES[region]).lower().encode("ascii", "ignore").decode()
    return (
        f"{name}{rng.choice(('', '.shop', '_' + str(rng.randint(1, 99))))}@{rng.choice(('example.com', 'example.org', 'mail.example.net'))}"
    )


def phone_number(rng: random.Random, region: str) -> str:
    """A telephone number from ranges reserved for fiction."""
    k = rng.randint(100, 199)
    if region == "amer":
        return rng.choice((f"+1 202 555 0{k}", f"(202) 555-0{k}", f"202-555-0{k}"))
    if region == "apac":
        return f"+61 491 570 {k}"
    return rng.choice((f"+44 7700 900{k}", f"+49 30 23125 {k}", f"+49-30-23125-{k}"))


def _luhn_digit(digits: str) -> str:
    """The check digit that makes `digits` a valid card number."""
    doubled = (int(d) * (2 if i % 2 == 0 else 1) for i, d in enumerate(reversed(digits)))
    return str(-sum(d - 9 if d > 9 else d for d in doubled) % 10)


def card_number(rng: random.Random) -> str:
    """A card number that passes the Luhn check: a well-known test number or a made-up one."""
    digits = rng.choice(("4111111111111111", "5555555555554444", "4" + "".join(rng.choices("0123456789", k=14))))
    digits += _luhn_digit(digits) if len(digits) == 15 else ""
    groups = [digits[i : i + 4] for i in range(0, 16, 4)]
    return rng.choice((" ", "-", "")).join(groups)
