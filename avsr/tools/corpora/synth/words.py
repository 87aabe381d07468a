"""The word lists and templates of the open vocabulary; ``sentences.py`` draws from them.

A template is a row of words; those in capitals are slots. Words that eSpeak NG could read in two ways ("read",
"live") and words whose article does not follow their spelling ("hour", "unit") are left out on purpose.
"""

from __future__ import annotations

# A line begins with the name of a slot or, indented, continues the one before. Phrases are separated by bars.
_SLOTS = """
PERSON: farmer teacher doctor nurse sailor painter baker driver lawyer singer dancer writer student captain gardener
  plumber butcher waiter tailor pilot soldier actor barber banker cook dentist engineer fisherman grocer hunter janitor
  judge librarian mayor mechanic musician neighbour officer potter professor reporter scientist secretary shepherd
  stranger tourist visitor widow carpenter
KIN: my sister | my brother | my uncle | my aunt | my cousin | my mother | my father | my grandmother | my grandfather |
  her husband | his wife | our neighbour | your friend | their daughter | their son | her nephew | his niece |
  our landlord | my boss | her teacher | his partner | our guide | your cousin | her best friend | his old friend |
  my roommate
ANIMAL: dog cat horse cow sheep goat pig rabbit fox wolf bear lion tiger monkey elephant camel donkey mouse rat squirrel
  hedgehog deer goose duck chicken turkey eagle owl parrot pigeon raven swan turtle frog lizard snake otter beaver
  badger puppy kitten pony
FOOD: bread butter cheese soup rice pasta salad chicken beef pork bacon salmon tuna honey jam yogurt cake pudding
  porridge chocolate pepper garlic spinach cabbage broccoli celery lettuce mustard sauce gravy pie popcorn toast stew
  fruit ginger vanilla cinnamon oatmeal ham
DRINK: water milk tea coffee juice lemonade cider cocoa wine beer broth syrup
FOODS: apples pears plums cherries lemons oranges grapes peaches berries onions carrots potatoes tomatoes beans peas
  mushrooms eggs cookies biscuits pancakes noodles sausages walnuts almonds peanuts olives pickles radishes turnips
  muffins
THING: book lamp chair table basket bottle bucket blanket pillow mirror ladder hammer shovel candle carpet clock camera
  guitar piano violin trumpet drum letter parcel package envelope pencil notebook newspaper magazine suitcase backpack
  umbrella jacket sweater hat scarf glove boot shirt necklace bracelet ring button needle kettle teapot saucer spoon
  fork knife plate bowl jug mug tray towel brush broom bell flag rope chain key map coin ticket photograph painting
  statue telescope lantern radio telephone keyboard battery engine wheel helmet
THINGS: books letters pictures flowers candles bottles boxes papers tickets coins stamps tools bricks stones shells
  feathers buttons ribbons blankets cushions chairs lanterns baskets postcards puzzles boots pencils plates glasses
  curtains
PLACE: garden kitchen bedroom cellar attic garage barn stable farm village town city market harbour station airport
  library museum theatre cinema school college hospital pharmacy bakery restaurant hotel office factory warehouse
  workshop church temple castle tower bridge tunnel forest valley mountain meadow beach island river lake swamp desert
  canyon park playground stadium square bank courthouse lighthouse cottage
SPOT: under the bed | behind the door | beside the window | on the table | on the shelf | near the fence | in the drawer
  | in the cupboard | under the stairs | by the fireplace | behind the curtain | on the roof | beside the sofa |
  in the corner | above the stove | on the porch | near the pond | beneath the oak tree | inside the cabinet |
  along the wall | next to the sink | by the front gate | on the back seat | at the bottom of the hill
VEHICLE: car bus train truck van tram taxi bicycle motorcycle scooter tractor wagon ferry boat canoe ship sailboat
  helicopter plane ambulance
OBJADJ: small large heavy light old new broken empty wooden plastic golden silver dusty dirty clean shiny expensive
  cheap pretty ugly square narrow wide tall short soft rough smooth thick thin red blue green yellow purple orange brown
  black white grey pink strange simple modern ancient fancy plain beautiful useful enormous tiny
PERADJ: young old tall kind clever brave quiet friendly lazy honest patient careful cheerful famous gentle polite proud
  rude serious shy silly stubborn strong thoughtful wise rich poor elderly generous handsome
MOOD: happy sad angry tired hungry thirsty nervous excited worried calm bored lonely curious jealous confused surprised
  disappointed grateful ashamed relieved upset sleepy anxious delighted embarrassed
TASTE: fresh sweet sour bitter salty spicy hot cold warm frozen delicious creamy crunchy rotten stale
WEATHER: sunny cloudy windy rainy foggy stormy snowy icy humid mild chilly freezing pleasant dreadful
TOOK: carried brought moved delivered dragged pushed returned rushed shipped hauled lugged sent took lifted
DIDTO: found lost bought sold stole borrowed cleaned washed painted repaired broke dropped hid packed polished wrapped
  measured covered noticed photographed admired ordered wanted needed kept chose collected examined ruined designed
MET: met helped called thanked followed greeted invited visited warned watched trusted ignored remembered forgot
  recognised surprised supported questioned blamed forgave interrupted advised encouraged phoned praised
MEETBASE: meet help call thank greet invite visit warn trust ignore remember forget recognise phone
DO: find buy sell borrow clean wash paint repair break drop hide pack polish wrap measure cover photograph order keep
  choose collect examine design move carry bring fetch replace inspect steal
WENT: walked ran drove hurried wandered travelled marched cycled raced strolled crept limped returned jogged
ATE: cooked baked tasted served ate ordered prepared mixed shared finished burned chopped
ANIMALDID: slept waited rested played jumped barked howled trembled vanished appeared escaped listened sneezed yawned
  stretched shivered
HOW: slowly quickly quietly carefully happily suddenly gently loudly proudly calmly bravely nervously politely patiently
  secretly eagerly sadly gladly
OFTEN: always never often usually sometimes rarely seldom frequently
WHEN: last night | this morning | yesterday afternoon | last week | last summer | before breakfast | after lunch |
  after dinner | on monday | on tuesday | on wednesday | on thursday | on friday | on saturday | on sunday | at noon |
  at midnight | in january | in march | in april | in august | in september | in october | in november | last december |
  two days ago | a month ago | many years ago | before sunset | during the storm | after the meeting | just before dawn
SOON: tomorrow | tonight | next week | next month | this evening | this weekend | on monday | on friday | at noon |
  after lunch | before dinner | next summer | in the morning | in the afternoon | later today | by wednesday |
  before winter | next spring
NUMBER: two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
  nineteen twenty thirty forty fifty sixty seventy eighty ninety
SUBJECT: history science music chemistry physics geography mathematics painting poetry biology medicine law football
  tennis swimming gardening cooking sailing fishing dancing drawing chess hockey astronomy
EVENT: meeting concert wedding party lecture match race festival parade exam interview auction ceremony contest funeral
  picnic dinner game trial rehearsal
MATERIAL: wood stone glass paper leather steel copper cotton wool silk clay marble rubber iron cardboard
SHE: he she they we i
CAN: can could should must will would might may
TALE: story joke legend secret rumour riddle fact poem myth lie
PLACEADJ: old new quiet crowded empty busy famous beautiful dark bright dirty clean small large noisy narrow modern
  ancient lonely sunny peaceful deserted
IDEA: plan answer story problem question reason secret rumour promise warning decision mistake argument discovery
  invention journey lesson message explanation
GOODADJ: good bad great terrible wonderful boring difficult easy dangerous important interesting strange funny foolish
  sensible perfect useless brilliant complicated remarkable
"""

_TEMPLATES = """
the PERADJ PERSON TOOK the OBJADJ THING to the PLACE | KIN DIDTO a OBJADJ THING at the PLACE WHEN |
the PERSON MET the PERADJ PERSON near the PLACE | SHE DIDTO NUMBER OBJADJ THINGS in the PLACE |
there was a OBJADJ THING SPOT WHEN | the PERADJ ANIMAL ANIMALDID HOW SPOT | KIN ATE the FOOD with TASTE FOODS WHEN |
can you bring me the OBJADJ THING from the PLACE | we CAN DO the THING and the THING SOON |
the VEHICLE to the PLACE was NUMBER minutes late | the PERSON was MOOD because the THING was OBJADJ |
KIN OFTEN drinks DRINK with FOOD and FOODS | it was a WEATHER day so KIN WENT to the PLACE |
the PERADJ PERSON WENT HOW through the PLACEADJ PLACE | please put the OBJADJ THING SPOT |
KIN CAN DO the OBJADJ THINGS SOON | the ANIMAL and the ANIMAL ANIMALDID SPOT |
who DIDTO the OBJADJ THING from the PLACE | SHE paid NUMBER dollars for a OBJADJ THING |
the PERSON told KIN a GOODADJ TALE about the ANIMAL | the PERSON explained the GOODADJ IDEA to KIN WHEN |
KIN OFTEN wanted to study SUBJECT and SUBJECT | the GOODADJ EVENT in the PLACE begins SOON |
the THING in the PLACE is made of MATERIAL and MATERIAL | KIN felt MOOD and MOOD after the GOODADJ EVENT |
the PERADJ PERSON MET KIN at the EVENT | we saw NUMBER PERADJ people in the PLACEADJ PLACE |
a TASTE bowl of FOODS was left SPOT | the VEHICLE stopped in front of the PLACEADJ PLACE |
do you remember the PERSON with the OBJADJ THING | KIN thinks that SUBJECT is GOODADJ and SUBJECT is GOODADJ |
nobody at the EVENT knew why KIN was MOOD | the weather near the PLACE will be WEATHER SOON |
the PERSON OFTEN asks a GOODADJ question about SUBJECT | KIN MET a MOOD PERSON on the way to the PLACE |
the PERADJ ANIMAL ANIMALDID HOW | SHE DIDTO the OBJADJ THING | KIN ATE the TASTE FOODS | where is the OBJADJ THING |
the PERADJ PERSON was very MOOD | KIN CAN DO the THING SOON | the PERSON WENT HOW to the PLACE |
SHE WENT to the PLACE WHEN | did you MEETBASE the PERADJ PERSON
"""


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in text.split("|")) if "|" in text else tuple(text.split())


_ENTRIES = (entry.partition(":") for entry in _SLOTS.replace("\n ", "").strip().split("\n"))
SLOTS: dict[str, tuple[str, ...]] = {name: _items(text) for name, _, text in _ENTRIES}
TEMPLATES: tuple[str, ...] = _items(_TEMPLATES)
