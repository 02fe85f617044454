"""Words for what a template of Home Assistant leaves to the user's home: rooms, floors, devices, things to say.

Written for ftlab. `LISTS` has the values of lists, `NAMES` those of ``{name}`` by the kind of device (domain).
"""

from __future__ import annotations

__all__ = ["LISTS", "NAMES"]

LISTS = {
    "en": {
        "area": "kitchen, living room, bedroom, bathroom, garage, hallway, office, dining room, guest room, nursery",
        "floor": "basement, attic, upstairs, downstairs, mezzanine, loft",
        "message": "dinner is ready, the taxi is here, we leave in five minutes, it is bedtime, the cake is done",
        "search_query": "jazz, the beatles, rain sounds, piano music, the evening news, summer hits",
        "zone": "home, work, school, gym, library",
        "timer_name": "pizza, pasta, laundry, egg, workout, tea",
        "timer_command": "turn off the lights, open the garage door, lock the front door, start the vacuum, mute tv",
        "shopping_list_item": "milk, apples, bread, coffee beans, dish soap, two lemons",
        "todo_list_item": "call the dentist, water the plants, pay the rent, book the train, wash the car",
    },
    "zh-CN": {
        "area": "客厅, 厨房, 卧室, 浴室, 书房, 餐厅, 儿童房, 车库, 阳台, 走廊",
        "floor": "一, 二, 三, 四, 顶, 地下一",
        "message": "吃饭了, 出租车到了, 五分钟后出发, 该睡觉了, 蛋糕烤好了",
        "search_query": "爵士乐, 雨声, 钢琴曲, 晚间新闻, 儿歌",
        "zone": "家, 公司, 学校, 健身房, 图书馆",
        "timer_name": "披萨, 煮面, 洗衣, 煮蛋, 运动, 泡茶",
        "timer_command": "关灯, 打开车库门, 锁上前门, 启动扫地机器人, 暂停音乐",
        "shopping_list_item": "牛奶, 苹果, 面包, 咖啡豆, 洗洁精, 鸡蛋",
        "todo_list_item": "给牙医打电话, 浇花, 交房租, 订火车票, 洗车",
    },
}
NAMES = {
    "en": {
        "binary_sensor": "motion sensor, window sensor, mailbox, driveway, parking space",
        "button": "doorbell, restart, reset",
        "climate": "thermostat, air conditioner, heat pump, floor heating",
        "cover": "garage door, blackout blinds, roller shutter, skylight, patio awning",
        "fan": "ceiling fan, desk fan, exhaust fan, tower fan",
        "input_boolean": "guest mode, vacation mode, quiet hours",
        "input_button": "reset, open sesame, feed the cat",
        "lawn_mower": "garden robot, shaun, clipper",
        "light": "chandelier, bedside lamp, desk lamp, spotlight, night light, string lights",
        "lock": "front door, back door, shed, cellar door, side gate",
        "media_player": "television, stereo, smart speaker, radio, soundbar",
        "person": "anna, peter, maria, sam, grandma",
        "scene": "movie night, good morning, dinner, bedtime, party",
        "script": "wake up routine, leaving home, plant watering, bedtime story",
        "sensor": "outdoor temperature, humidity sensor, power meter, air quality",
        "switch": "coffee maker, power strip, christmas tree, water pump, humidifier",
        "todo": "groceries, chores, packing, birthday, workshop",
        "vacuum": "robot vacuum, dusty, hoover, floor cleaner",
        "valve": "water valve, main valve, gas valve, sprinkler valve",
        "weather": "berlin, london, boston, oslo",
    },
    "zh-CN": {
        "binary_sensor": "人体传感器, 窗户传感器, 信箱, 车道, 停车位",
        "button": "门铃, 重启, 复位",
        "climate": "空调, 恒温器, 热泵, 地暖",
        "cover": "窗帘, 卷帘, 天窗, 遮阳棚, 车库门",
        "fan": "吊扇, 排气扇, 落地扇, 塔扇",
        "input_boolean": "访客模式, 度假模式, 安静模式",
        "input_button": "复位, 喂猫, 芝麻开门",
        "lawn_mower": "小绿, 草坪机器人, 花园管家",
        "light": "吊灯, 台灯, 床头灯, 落地灯, 夜灯, 彩灯",
        "lock": "前门, 后门, 侧门, 地窖门, 储藏室",
        "media_player": "电视, 音响, 收音机, 智能音箱, 回音壁",
        "person": "小明, 安娜, 爸爸, 妈妈, 奶奶",
        "scene": "回家, 睡眠, 观影, 派对, 早安",
        "script": "起床流程, 离家流程, 浇花流程, 睡前故事",
        "sensor": "室外温度计, 湿度计, 电表, 空气检测仪",
        "switch": "咖啡机, 插线板, 圣诞树, 水泵, 加湿器",
        "todo": "家务清单, 旅行清单, 工作清单, 生日清单",
        "vacuum": "扫地机器人, 小白, 吸尘器",
        "valve": "水阀, 总阀, 燃气阀, 喷淋阀",
        "weather": "北京, 上海, 广州, 柏林",
    },
}
